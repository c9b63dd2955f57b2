"""Shape and dtype annotations, checked at run time in the tests only (see tests/conftest.py)."""

from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray, PyTree, UInt32

# Keys come typed (jax.random.key) or raw (jax.random.PRNGKey).
Key = PRNGKeyArray | UInt32[Array, "2"]

__all__ = ["Array", "Bool", "Float", "Int", "Key", "PyTree"]
