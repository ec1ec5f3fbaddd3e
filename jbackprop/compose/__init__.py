"""Composites: what routes deltas between layers."""

from jbackprop.compose.bidirectional import bidirectional as bidirectional
from jbackprop.compose.checkpoint import Checkpoint as Checkpoint
from jbackprop.compose.cnn import cnn as cnn
from jbackprop.compose.fan_out import FanOut as FanOut
from jbackprop.compose.fan_out import Parallel as Parallel
from jbackprop.compose.frozen import Frozen as Frozen
from jbackprop.compose.lstm import lstm as lstm
from jbackprop.compose.mlp import mlp as mlp
from jbackprop.compose.repeat import Repeat as Repeat
from jbackprop.compose.resnet import resnet as resnet
from jbackprop.compose.reversible import Reversible as Reversible
from jbackprop.compose.sequential import Sequential as Sequential
from jbackprop.compose.skip import Skip as Skip
from jbackprop.compose.tied import Tied as Tied
