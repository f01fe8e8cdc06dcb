"""The tests. pytest's jaxtyping hook reaches `shape_checks.check` as an attribute of this package."""

from tests import shape_checks as shape_checks
