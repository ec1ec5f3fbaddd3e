"""Training with Optax."""

from jbackprop.train.accounting import Privacy as Privacy
from jbackprop.train.evaluation import evaluate as evaluate
from jbackprop.train.fit import EarlyStopping as EarlyStopping
from jbackprop.train.fit import Epoch as Epoch
from jbackprop.train.fit import Fit as Fit
from jbackprop.train.fit import fit as fit
from jbackprop.train.loggers import CSVLogger as CSVLogger
from jbackprop.train.loggers import JSONLinesLogger as JSONLinesLogger
from jbackprop.train.loggers import TensorBoardLogger as TensorBoardLogger
from jbackprop.train.private import Private as Private
from jbackprop.train.run import NonFiniteError as NonFiniteError
