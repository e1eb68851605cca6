"""The one error type that users of the package need to catch."""


class IcmError(ValueError):
    """Input that cannot be used; says what was given, what was expected and what to do."""


def reason(error: BaseException) -> str:
    """The first line of what another library raised, for a message of ours; its type if empty.

    >>> reason(ValueError("no such file\\nat 0x7f")), reason(KeyboardInterrupt())
    ('no such file', 'KeyboardInterrupt')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
