"""The bench: does growth pay on an experiment, against the same training compute spent otherwise?"""
