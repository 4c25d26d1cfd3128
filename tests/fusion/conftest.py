from tests.raising.conftest import group

__all__ = ["group"]
