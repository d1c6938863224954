"""Who writes solutions: servers, the cascade that asks them, and the records that are kept."""

from slm.teachers.endpoint import Endpoint

__all__ = ["Endpoint", "cascade", "records"]
