"""The data tests' tokenizer, for the verbs that take one."""

from tests.data.conftest import tokenizer  # noqa: F401
