"""The catalogue: gradients with a planted error, and right ones."""

from planted.arrays import WRONG_ARRAYS
from planted.derivations import WRONG_DERIVATIONS
from planted.entries import Entry as Entry
from planted.entries import Planted as Planted
from planted.entries import Right as Right
from planted.operations import WRONG_OPERATIONS
from planted.right import RIGHT as RIGHT

PLANTED: tuple[Planted, ...] = (*WRONG_ARRAYS, *WRONG_DERIVATIONS, *WRONG_OPERATIONS)
