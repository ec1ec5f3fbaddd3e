"""Logs of training, as callbacks of `fit`: CSV, JSON lines, TensorBoard.

All of them keep the same promises:

- One row an epoch, in the file before the next epoch begins. A process that is killed loses at
  most the row being written, and the next one fills it in: the history that `fit` goes on with has
  its values.
- A run that goes on (`fit` begins at a later epoch than 1) continues the log. Rows from that epoch
  on are replaced, missing ones before it filled in, without their time.
- Nothing is lost unasked. A log of another run (training is at epoch 1 again, and there is more
  than that epoch, or else; other names, other values) raises FileExistsError at the first epoch.
  With `overwrite=True` it is replaced: that is for scripts that are started again and again, and
  may have to begin anew. What is not a log is never replaced, and refused before training.
- A log costs no training: what cannot be written at the first epoch raises OSError with the path;
  later there is a RuntimeWarning, and the next row that can be written brings the missing ones.
- Only process 0 writes. Make loggers after `jax.distributed.initialize`.

An entry of the history that has not a value for every epoch is left out, with a RuntimeWarning:
which epochs its values are of is not known.
"""

from jbackprop.train.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
from jbackprop.train.loggers.text import CSVLogger as CSVLogger
from jbackprop.train.loggers.text import JSONLinesLogger as JSONLinesLogger
