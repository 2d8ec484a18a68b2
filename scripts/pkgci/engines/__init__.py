"""What runs a job: `local` (embedded) or `jenkins`, by the verbs of `base.py`."""
