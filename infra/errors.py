"""What the commands of the platform tell the user instead of a traceback."""


class PlatformError(Exception):
    """Something of the platform cannot be had; the message says what, why, and what to do about it."""
