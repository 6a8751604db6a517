"""Lightning callbacks: when curation happens."""

from curation.callbacks.concept_aware import ConceptAwareSelection
from curation.callbacks.concept_coverage import ConceptCoverageMonitor
from curation.callbacks.difficulty_adaptive_rollouts import DifficultyAdaptiveRollouts
from curation.callbacks.exact_resume import ExactResume
from curation.callbacks.global_batch_load_balancing import GlobalBatchLoadBalancing
from curation.callbacks.hard_batches import HardBatchTraining
from curation.callbacks.hard_samples import HardSampleSelection
from curation.callbacks.instance_selection import InstanceSelection
from curation.callbacks.online_selection import OnlineSelection
from curation.callbacks.records import SampleRecord, SelectionLedger
from curation.callbacks.run_meter import RunMeter
from curation.callbacks.selected_data import SelectedDataModule
from curation.callbacks.uniform import UniformSelection
from curation.callbacks.utility_diversity import UtilityDiversitySelection

__all__ = [
    "ConceptAwareSelection",
    "ConceptCoverageMonitor",
    "DifficultyAdaptiveRollouts",
    "ExactResume",
    "GlobalBatchLoadBalancing",
    "HardBatchTraining",
    "HardSampleSelection",
    "InstanceSelection",
    "OnlineSelection",
    "RunMeter",
    "SampleRecord",
    "SelectedDataModule",
    "SelectionLedger",
    "UniformSelection",
    "UtilityDiversitySelection",
]
