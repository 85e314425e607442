"""One self-contained page about one run or several: what happened, on what evidence, at what price."""
