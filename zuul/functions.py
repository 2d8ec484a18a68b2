"""Parameter functions of layout.yaml, for Zuul 2.6, which runs them in its own process: Python 2.7, ASCII.

Source: Zuul 2.6.0, "Parameter Function".
"""

# of Zuul itself; no job has them
ZUULS_OWN = ("BASE_LOG_PATH", "LOG_PATH", "ZUUL_CHANGE_IDS", "ZUUL_VOTING")


def change_parameters(_item, params):
    """Leave the parameters that a build or a gate has, each a text.

    Args:
        _item: Zuul's QueueItem.
        params: the parameters by name, changed in place.
    """
    for name, value in list(params.items()):
        # Zuul does not know each of them at all times
        if value is None or name in ZUULS_OWN:
            del params[name]
