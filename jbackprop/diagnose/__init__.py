"""What is going on inside: how deltas flow, which units are saturated or dead, where NaN began."""

from jbackprop.diagnose import pictures as pictures
from jbackprop.diagnose.flow import DeltaFlow as DeltaFlow
from jbackprop.diagnose.flow import delta_norms as delta_norms
from jbackprop.diagnose.nonfinite import first_nonfinite as first_nonfinite
from jbackprop.diagnose.pictures import plot as plot
from jbackprop.diagnose.units import Saturation as Saturation
from jbackprop.diagnose.units import SaturationTable as SaturationTable
from jbackprop.diagnose.units import saturation as saturation
