"""Second derivatives of the mean cost: products, diagonals, Kronecker factors, spectra."""

from jbackprop.curvature.diagonals import diag_fisher as diag_fisher
from jbackprop.curvature.diagonals import diag_ggn as diag_ggn
from jbackprop.curvature.roots import Empirical as Empirical
from jbackprop.curvature.roots import Exact as Exact
from jbackprop.curvature.roots import MonteCarlo as MonteCarlo
from jbackprop.curvature.roots import Roots as Roots
from jbackprop.curvature.products import fisher_product as fisher_product
from jbackprop.curvature.products import ggn_product as ggn_product
from jbackprop.curvature.products import hessian_product as hessian_product
from jbackprop.curvature.blocks import BlockDiagonal as BlockDiagonal
from jbackprop.curvature.blocks import Diagonal as Diagonal
from jbackprop.curvature.blocks import Eigen as Eigen
from jbackprop.curvature.blocks import Kronecker as Kronecker
from jbackprop.curvature.kfac import ekfac as ekfac
from jbackprop.curvature.kfac import kfac as kfac
from jbackprop.curvature.kfac import update_average as update_average
