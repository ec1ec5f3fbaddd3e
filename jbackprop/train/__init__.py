"""Training with Optax."""

from jbackprop.train.accounting import Privacy as Privacy
from jbackprop.train.checkpoints import CheckpointError as CheckpointError
from jbackprop.train.checkpoints import Checkpoints as Checkpoints
from jbackprop.train.evaluation import evaluate as evaluate
from jbackprop.train.fit import Epoch as Epoch
from jbackprop.train.fit import Fit as Fit
from jbackprop.train.fit import fit as fit
from jbackprop.train.loggers import CSVLogger as CSVLogger
from jbackprop.train.loggers import JSONLinesLogger as JSONLinesLogger
from jbackprop.train.loggers import TensorBoardLogger as TensorBoardLogger
from jbackprop.train.preemption import Preempted as Preempted
from jbackprop.train.private import Private as Private
from jbackprop.train.run import NonFiniteError as NonFiniteError
from jbackprop.train.stopping import EarlyStopping as EarlyStopping
