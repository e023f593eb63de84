# shellcheck shell=bash
# Sourced by local-cluster.sh when CLUSTER_SACCT=1: a private MariaDB and slurmdbd, so that sacct,
# sacctmgr work.  Adds about 10 s to `up`.
PACKAGES+=(slurmdbd mariadb-server)
CLUSTER_EXTRA="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$NET.254
AccountingStoragePort=$((PORT + 1))
AccountingStoragePass=$DIR/munge/socket
AccountingStorageTRES=gres/gpu
${CLUSTER_EXTRA:-}"

start_slurmdbd() {
    rm -rf "${DIR:?}/db"
    mariadb-install-db --no-defaults --user=root --datadir="$DIR/db" --skip-test-db \
        --auth-root-authentication-method=normal >"$DIR/log/mariadb-install.out" 2>&1 9>&-
    spawn mariadbd mariadbd --no-defaults --user=root --datadir="$DIR/db" --bind-address="$NET.254" \
        --socket="$DIR/run/mariadb" --pid-file="$DIR/run/mariadbd.raw"
    wait_for 20 mariadb -u root -S "$DIR/run/mariadb" -e "create or replace user slurm
        identified by 'slurm'; grant all on slurm_acct_db.* to slurm" || die "mariadbd: see $DIR/log"
    (umask 077; cat >"$DIR/etc/slurmdbd.conf") <<CONF
AuthInfo=socket=$DIR/munge/socket
DbdHost=$(hostname -s)
DbdPort=$((PORT + 1))
SlurmUser=root
PidFile=$DIR/run/slurmdbd.raw
StorageType=accounting_storage/mysql
StorageHost=$NET.254
StorageUser=slurm
StoragePass=slurm
CONF
    spawn slurmdbd slurmdbd -D
    wait_for 20 sacctmgr -i add cluster slurmlocal || die "slurmdbd: see $DIR/log/slurmdbd.out"
}
