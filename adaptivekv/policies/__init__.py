"""Every stage by name. A new method is one file and one line here."""

from adaptivekv.policies.base import KINDS, Stage
from adaptivekv.policies.eviction.duo import Duo
from adaptivekv.policies.eviction.expected import Expected
from adaptivekv.policies.eviction.h2o import H2O
from adaptivekv.policies.eviction.hashevict import HashEvict
from adaptivekv.policies.eviction.infinipot import InfiniPot
from adaptivekv.policies.eviction.keydiff import KeyDiff
from adaptivekv.policies.eviction.knorm import KNorm
from adaptivekv.policies.eviction.kvzap import KVzap
from adaptivekv.policies.eviction.kvzip import KVzip
from adaptivekv.policies.eviction.morph import Morph
from adaptivekv.policies.eviction.nacl import NACL
from adaptivekv.policies.eviction.qhitter import QHitter
from adaptivekv.policies.eviction.snapkv import SnapKV
from adaptivekv.policies.eviction.streaming import Streaming
from adaptivekv.policies.eviction.tova import TOVA
from adaptivekv.policies.offload.host import Offload
from adaptivekv.policies.quantization.float8 import FP8
from adaptivekv.policies.quantization.hotcold import HotCold
from adaptivekv.policies.quantization.kivi import Kivi2, Kivi4, Kivi42
from adaptivekv.policies.quantization.kvquant import KVQuant
from adaptivekv.policies.quantization.palu import Palu
from adaptivekv.policies.quantization.tuned import Tuned
from adaptivekv.policies.quantization.uniform import K4V2, Int2, Int4, Int8
from adaptivekv.policies.retrieval.retrieve import Retrieve

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        Streaming, SnapKV, H2O, KNorm, KeyDiff, TOVA, Expected, Morph, NACL, KVzip, KVzap,
        HashEvict, InfiniPot, Duo, QHitter,
        Int8, Int4, K4V2, Int2, FP8, Kivi4, Kivi42, Kivi2, KVQuant, HotCold, Tuned, Palu, Offload, Retrieve,
    )
}  # fmt: skip

__all__ = ["KINDS", "STAGES", "Stage"]
