"""Factored gradients: what the gradient of a weight is made of.

`base` says what all kinds have in common; the kinds are in the files after it.
"""

from jbackprop.factored.base import Factored as Factored
from jbackprop.factored.base import Method as Method
from jbackprop.factored.base import devices_of as devices_of
from jbackprop.factored.base import in_blocks as in_blocks
from jbackprop.factored.base import is_factored as is_factored
from jbackprop.factored.base import place_in as place_in
from jbackprop.factored.base import scan_examples as scan_examples
from jbackprop.factored.lookup import Lookup as Lookup
from jbackprop.factored.other import Coupled as Coupled
from jbackprop.factored.other import Full as Full
from jbackprop.factored.other import Nothing as Nothing
from jbackprop.factored.other import Sum as Sum
from jbackprop.factored.outer import Outer as Outer
from jbackprop.factored.patches import Geometry as Geometry
from jbackprop.factored.patches import Patches as Patches
from jbackprop.factored.place import Place as Place
from jbackprop.factored.place import Step as Step
from jbackprop.factored.shift import Scale as Scale
from jbackprop.factored.shift import Shift as Shift
from jbackprop.factored.sums import Moments as Moments
from jbackprop.factored.sums import PyTree as PyTree
from jbackprop.factored.sums import einsum as einsum
from jbackprop.factored.sums import in_shares as in_shares
from jbackprop.factored.sums import present as present
from jbackprop.factored.sums import promoted_sum as promoted_sum
from jbackprop.factored.sums import weighted as weighted
from jbackprop.factored.sums import wide_dtype as wide_dtype
from jbackprop.factored.sums import wide_square as wide_square
from jbackprop.factored.sums import widest_dtype as widest_dtype
