"""Is this gradient right; and if not, what is wrong with it?"""

from jbackprop.check.functions import assert_gradient as assert_gradient
from jbackprop.check.functions import assert_jvp as assert_jvp
from jbackprop.check.functions import assert_vjp as assert_vjp
from jbackprop.check.functions import gradient as gradient
from jbackprop.check.functions import jvp as jvp
from jbackprop.check.functions import vjp as vjp
from jbackprop.check.judge import TruthWarning as TruthWarning
from jbackprop.check.layer import assert_layer as assert_layer
from jbackprop.check.layer import layer as layer
from jbackprop.check.network import assert_network as assert_network
from jbackprop.check.network import network as network
from jbackprop.check.report import Figures as Figures
from jbackprop.check.report import Report as Report
