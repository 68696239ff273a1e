"""How a server behind fails: the request is at fault, or the server is and another may do."""

from star_elastic.serve.answers import AnswerFailed
from star_elastic.serve.schema import BadRequest


class UpstreamRefused(BadRequest, AnswerFailed):
    """The server behind refuses the request as it stands; no other would take it.

    So it is answered like a request that was refused here, with that server's status (400, 413, 422
    and the like), message, `param` and `code`.
    """

    def __init__(
        self, why: str, status: int, param: str | None = None, code: str | None = None
    ) -> None:
        BadRequest.__init__(self, why, param, code or "upstream_refused", status)
        self.retry_after_s = None


class Unusable(Exception):
    """A replica gave no piece of an answer; another one may.

    `busy`: it said so (429, 503), and perhaps for how long. `unreachable`: nobody listens there.
    """

    def __init__(
        self,
        why: str,
        busy: bool = False,
        unreachable: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(why)
        self.busy, self.unreachable, self.retry_after_s = busy, unreachable, retry_after_s


class Garbled(ValueError):
    """What came is no stream of chunks, or more of it than is read."""
