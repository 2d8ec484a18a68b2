"""RPM."""


class Rpm:
    """RPM."""
