"""The forge: bus, store, pools and Karn as one set of processes beside a run."""
