"""Networks in files, and configurations as JSON: whole or not at all, and never unpickled."""

from jbackprop.saved.configuration import FormatError as FormatError
from jbackprop.saved.configuration import configuration as configuration
from jbackprop.saved.configuration import difference as difference
from jbackprop.saved.network import Saved as Saved
from jbackprop.saved.network import load as load
from jbackprop.saved.network import save as save
