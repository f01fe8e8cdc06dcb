"""The tests. `check` lives in `tests.shape_checks`; pytest's jaxtyping hook reaches it as an attribute of this package."""

from tests import shape_checks as shape_checks
