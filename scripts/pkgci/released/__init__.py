"""The released repositories: what users install from, one for each release and codename, signed; see `repository.py`."""
