"""Plain PyTorch: batch norm scales and their training, input normalisation, batch norm over ranks. Never Lightning.

Scales: find, judge, write, train
    layers              the batch norm layers of a model, and the verdict on each
    copies              frozen copies of a network, which get the scales of their originals
    initialization      write the scales, and report which layers were written
    eps                 write eps, and report which layers got it
    update_rule         scales learn with lr / c inside the optimizer's own step
    rule_engine         runs a step on the parts of the groups, for all update rules on an optimizer
    optimizer_view      the object that a step runs on, with other groups than the optimizer
    optimizer_checks    optimizers for which the rule cannot hold
    group_lists         lists that an optimizer pairs with its groups by position
    coverage            the parameters that learn differently from their group
    rates               their learning rates and weight decays
    group_parts         a parameter group as an update sees it: copied into parts, and written back
    update_watch        whether a step has changed a parameter, and has read how it learns
    update_doubts       undoes a first update that has not read how scales and shifts learn
    param_groups        permanent groups, for engines that take the parameters away from the optimizer
    gathered            whole parameters where FSDP1 or ZeRO-3 leaves every rank a part
    identity            the equivalent settings of a network whose scales start at 1

Scales: measure
    affine_statistics   mean, spread and drift of the scales and shifts of all layers
    affine_parameters   the scales and shifts of all layers as a vector, with a single copy to the host
    activations         how large the normalised values get inside the layers

Input normalisation
    input_settings      the settings
    batch_places        how settings name places in a batch
    input_norm          the standardiser that every training batch adds to
    input_learner       the statistics of an input, learned batch by batch
    joint_training      training batches of several inputs, with a single collective
    estimators          the mean and variance that each mode normalises by
    input_transform     `(x - mean) * gain` that an estimate asks for: applied, undone, exported
    input_statistics    the statistics of training batches, as tensors for a checkpoint
    input_state         the state in a checkpoint, and the states that are refused
    input_masks         which values of a batch count, and which are replaced
    keep_rules          the same by arithmetic, piece by piece while a piece is in the cache
    input_comparison    batches of evaluation beside the training data
    input_checks        the batches that are refused, and their errors
    input_advice        hints for the user about the data
    moments             count, mean and squared deviations: measured and merged without cancellation
    global_moments      the moments of a batch over all ranks, with a single collective
    integer_sums        exact sums of integers, and the moments that follow from them
    channel_view        a tensor by channel, in the order of its memory and in pieces for the cache
    fixed_normalizer    `(x - mean) * gain` with given constants, as a function and as a module to export
    input_batch_norm    the paper's front layer, whose scale is trained
    compiled            functions that `torch.compile` compiles once per process

Batch norm over several ranks
    batch_norm_sync     layers that normalise by the batch of all ranks and keep their own class
    batch_norm_calls    intercepts the calls of batch norm in a block of code
    global_batch_norm   the arithmetic: running statistics, output and gradients

Checks and names
    arguments           checks of arguments
    rank_settings       settings that ranks must share, compared without a collective
    metric_keys         the names of all metrics
    setting_keys        the names of a run's settings among its hyperparameters
    module_names        dotted names of modules, without the levels of wrappers
    next_call           calls of a method that go through a function, once or until it is undone
    table               tables of text
    printable           foreign text, made safe to print
    torch_compat        every private name of torch, and the loss without it

Imports go one way. `arguments`, `batch_norm_calls`, `batch_places`, `channel_view`, `compiled`, `identity`,
`metric_keys`, `printable`, `setting_keys` and `torch_compat` import nothing of this package. `layers` imports
`input_batch_norm`, which is a batch norm layer too. Writing, training and measuring scales import `layers`.
"""
