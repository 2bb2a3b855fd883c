"""The errors a caller is expected to handle; each message is one line that names the field and the fix."""


class AdaptiveKVError(ValueError):
    """Bad input or an impossible request. The command line prints the message alone and exits with 2."""


class BudgetError(AdaptiveKVError):
    """The device KV budget cannot hold what was asked for, after demoting and offloading everything allowed."""


class CacheFileError(AdaptiveKVError):
    """A saved cache is missing, truncated, corrupt or of another version: a miss, never a wrong token."""
