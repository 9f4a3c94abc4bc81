"""A user's mistake in the data: what it is about, where, why it can't work, and what to do."""


class Problem(ValueError):
    """Raised where the work has to stop, or listed by `data.check`."""

    def __init__(self, what: str, where: object, reason: str, fix: str):
        super().__init__(f"{what} {where}: {reason}; {fix}")
        self.what = what
        self.where = str(where)
        self.reason = reason
        self.fix = fix
