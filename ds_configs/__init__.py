"""DeepSpeed JSON files that `zero.config` names; installed as `megalm.ds_configs`."""
