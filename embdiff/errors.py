"""The one exception that means 'the user can fix this'."""


class UserError(ValueError):
    """Bad input, said in one line: the value, the cause, the fix."""
