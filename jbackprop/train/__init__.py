"""Training with Optax."""

from jbackprop.train.evaluation import evaluate as evaluate
from jbackprop.train.fit import EarlyStopping as EarlyStopping
from jbackprop.train.fit import Epoch as Epoch
from jbackprop.train.fit import Fit as Fit
from jbackprop.train.fit import NonFiniteError as NonFiniteError
from jbackprop.train.fit import fit as fit
