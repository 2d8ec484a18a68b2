"""The mirrors of released repositories: one transaction for all mirrors of a repository; see `transaction.py`."""
