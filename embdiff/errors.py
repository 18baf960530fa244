"""The one exception that means 'the user can fix this'."""


class UserError(ValueError):
    """Bad input, said in one line: the value, the cause, the fix."""


def reason(error: BaseException, most: int = 200) -> str:
    """What a library's error says, in one line of at most so many characters; its kind if it says nothing."""
    return " ".join(str(error).split())[:most].rstrip(" .") or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, had no memory left; torch says so in several ways."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text))
    )
