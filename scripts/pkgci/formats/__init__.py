"""What both package formats do, by the same verbs: see `base.py`."""
