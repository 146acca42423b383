"""Plain PyTorch: batch norm scales and their training, input normalisation, batch norm over ranks. Never Lightning.

Scales: find, judge, write, train
    layers              which batch norm layers a model has, and the verdict on each
    initialization      write the scales; the report of what was written and what was left alone
    update_rule         scales learn with lr / c inside the optimizer's own step
    rule_engine         makes a step run on the parts of the groups, for all update rules on an optimizer
    coverage            which parameters learn in a way of their own, and with which rates
    group_parts         how one parameter group looks to an update: copied into parts, and written back
    param_groups        permanent groups, for engines that take the parameters away from the optimizer
    gathered            whole parameters where FSDP1 or ZeRO-3 leaves every rank a part

Scales: measure
    affine_statistics   mean, spread and drift of the scales and shifts of all layers
    affine_parameters   the scales and shifts of all layers as one vector, with one copy to the host
    activations         how large the normalised values get inside the layers

Input normalisation
    input_settings      the settings
    batch_places        how settings name places in a batch
    input_norm          the standardiser that every training batch adds to
    input_learner       what one input has taught, batch by batch
    joint_training      training batches of several inputs, with one collective
    estimators          whose mean and variance each mode normalises by
    input_transform     `(x - mean) * gain` that an estimate asks for: applied, undone, exported
    input_statistics    what training batches have told
    input_state         the same in a checkpoint, and which states are refused
    input_masks         which values of a batch count, and which are replaced
    keep_rules          the same by arithmetic, piece by piece while a piece is in the cache
    input_comparison    batches of evaluation beside the training data
    input_checks        which batches are refused, and what the error says
    input_advice        what the user is told about the data
    moments             count, mean and squared deviations: measured and merged without cancellation
    global_moments      the moments of a batch over all ranks, with one collective
    integer_sums        exact sums of integers, and the moments that follow from them
    channel_view        a tensor by channel, in the order of its memory and in pieces for the cache
    fixed_normalizer    `(x - mean) * gain` with given constants, as a function and as a module to export
    input_batch_norm    the paper's front layer, whose scale is trained
    compiled            functions that `torch.compile` compiles once a process

Batch norm over several ranks
    batch_norm_sync     layers that normalise by the batch of all ranks and keep their own class
    global_batch_norm   the arithmetic: running statistics, output and gradients

Checks and names
    arguments           checks of arguments
    metric_keys         the names of all metrics
    table               tables of text
    torch_compat        every private name of torch, and what is lost without it

Imports go one way. `arguments`, `batch_places`, `metric_keys`, `channel_view`, `compiled`, `table` and `torch_compat`
import nothing of this package. `layers` stands on `input_batch_norm`, which is a batch norm layer too; writing,
training and measuring scales stand on `layers`.
"""
