"""Other ways to assign credit than backpropagation, on the same sweep, and how far they are off."""

from jbackprop.credit.angles import Alignment as Alignment
from jbackprop.credit.angles import Recorder as Recorder
from jbackprop.credit.angles import alignment as alignment
from jbackprop.credit.carriers import map_feedback as map_feedback
from jbackprop.credit.direct import DirectFeedbackAlignment as DirectFeedbackAlignment
from jbackprop.credit.direct import DirectRandomTargetProjection as DirectRandomTargetProjection
from jbackprop.credit.equilibrium import EquilibriumPropagation as EquilibriumPropagation
from jbackprop.credit.forward_forward import ForwardForward as ForwardForward
from jbackprop.credit.forward_gradient import ForwardGradient as ForwardGradient
from jbackprop.credit.predictive import PredictiveCoding as PredictiveCoding
from jbackprop.credit.rule import Info as Info
from jbackprop.credit.rule import Rule as Rule
from jbackprop.credit.rule import State as State
from jbackprop.credit.target import DifferenceTargetPropagation as DifferenceTargetPropagation
from jbackprop.credit.transported import Backpropagation as Backpropagation
from jbackprop.credit.transported import FeedbackAlignment as FeedbackAlignment
from jbackprop.credit.transported import KolenPollack as KolenPollack
from jbackprop.credit.transported import SignSymmetry as SignSymmetry
from jbackprop.credit.transported import Transported as Transported
from jbackprop.credit.transported import WeightMirror as WeightMirror
