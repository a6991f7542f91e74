"""Checks that configurations share."""


def check_positive(prefix: str, config: object, *names: str) -> None:
    """Raise ValueError unless these fields are positive numbers, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{prefix}.{name} is {value}: it must be positive")


def check_share(prefix: str, config: object, *names: str) -> None:
    """Raise ValueError unless these fields, probabilities or shares, lie in 0..1."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{prefix}.{name} is {value}: it must be in 0..1")
