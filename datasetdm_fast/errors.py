"""The three ways to say no; each carries the cause, the remedy and the exit code of the command that meets it."""


class _Stop(Exception):
    exit_code = 1

    def __init__(self, cause: str, remedy: str = ""):
        super().__init__(cause if not remedy else f"{cause}\n{remedy}")
        self.cause, self.remedy = cause, remedy


class Refused(_Stop, ValueError):
    """Bad input or usage."""

    exit_code = 2


class Missing(_Stop, RuntimeError):
    """Something needed is not there: weights, an engine, a GPU, a library, disk space."""

    exit_code = 3


class GateFailed(_Stop, RuntimeError):
    """The work was done, but a check on it failed or samples were set aside."""

    exit_code = 4


REFUSALS = {
    kind.__name__: kind for kind in (Refused, Missing, GateFailed)
}  # by name, as one process passes them to another
