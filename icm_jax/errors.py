"""The one error type that users of the package need to catch."""


class IcmError(ValueError):
    """Input that cannot be used; says what was given, what was expected and what to do."""
