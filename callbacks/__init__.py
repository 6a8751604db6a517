"""Lightning callbacks: when curation happens."""

from curation.callbacks.batch_size.adaptive_batch_size import AdaptiveBatchSize
from curation.callbacks.batch_size.batch_size_scheduler import BatchSizeScheduler
from curation.callbacks.experts.global_batch_load_balancing import GlobalBatchLoadBalancing
from curation.callbacks.instances.embed import embed
from curation.callbacks.instances.instance_selection import InstanceSelection
from curation.callbacks.instances.selected_data import SelectedDataModule
from curation.callbacks.lightning.seam import SeamClient
from curation.callbacks.online.choice import Choice, SelectionListener
from curation.callbacks.online.concept_aware import ConceptAwareSelection
from curation.callbacks.online.hard_samples import HardSampleSelection
from curation.callbacks.online.online_selection import OnlineSelection
from curation.callbacks.online.proxy import ProxySelection
from curation.callbacks.online.replay import ReplaySelection, SelectionRehearsal
from curation.callbacks.online.uniform import UniformSelection
from curation.callbacks.online.utility_diversity import UtilityDiversitySelection
from curation.callbacks.online.weighted_loss import TokenWeightedLoss, WeightedLoss
from curation.callbacks.records.sample_record import SampleRecord
from curation.callbacks.records.sample_table import SampleTable
from curation.callbacks.records.selection_ledger import SelectionLedger
from curation.callbacks.records.training_dynamics import TrainingDynamics
from curation.callbacks.rollouts.difficulty_adaptive_rollouts import DifficultyAdaptiveRollouts
from curation.callbacks.runs.exact_resume import ExactResume
from curation.callbacks.runs.final_checkpoint import FinalCheckpoint
from curation.callbacks.runs.run_meter import RunMeter
from curation.callbacks.runs.token_meter import TokenMeter
from curation.callbacks.runs.wandb_run import same_wandb_run
from curation.callbacks.samplers.concept_coverage import ConceptCoverageMonitor
from curation.callbacks.samplers.dynamic_data_pruning import DynamicDataPruning
from curation.callbacks.samplers.hard_batches import HardBatchTraining

__all__ = [
    "AdaptiveBatchSize",
    "BatchSizeScheduler",
    "Choice",
    "ConceptAwareSelection",
    "ConceptCoverageMonitor",
    "DifficultyAdaptiveRollouts",
    "DynamicDataPruning",
    "ExactResume",
    "FinalCheckpoint",
    "GlobalBatchLoadBalancing",
    "HardBatchTraining",
    "HardSampleSelection",
    "InstanceSelection",
    "OnlineSelection",
    "ProxySelection",
    "ReplaySelection",
    "RunMeter",
    "SampleRecord",
    "SampleTable",
    "SeamClient",
    "SelectedDataModule",
    "SelectionLedger",
    "SelectionListener",
    "SelectionRehearsal",
    "TokenMeter",
    "TokenWeightedLoss",
    "TrainingDynamics",
    "UniformSelection",
    "UtilityDiversitySelection",
    "WeightedLoss",
    "embed",
    "same_wandb_run",
]
