"""Package CI: the Python package that runs inside each job of this repository."""
