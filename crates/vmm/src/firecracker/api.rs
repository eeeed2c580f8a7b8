//! The requests that are ever made: a closed set. Paths are constants; bodies hold numbers, names
//! of the driver's own, and the jail's paths. MMDS, the balloon, hot-plug, CPU templates, metrics
//! and the logger are not here, so they are never configured.

use super::{Limits, Spec};
use crate::limits::{
    API_CALL_MAX, CPUS_MAX_FIRECRACKER, MEMORY_MAX_MIB, MEMORY_MIN_MIB, MIGRATE_MAX,
};
use crate::qemu::GUEST_MAC;
use serde_json::{Value, json};
use std::num::NonZeroU64;
use std::time::Duration;

/// The tap's name, in the VMM's network namespace. It is part of a template's state.
pub const TAP: &str = "tap0";
/// The guest's address on vsock. Each VM has a backend of its own, so all may have the same.
pub const GUEST_CID: u32 = 3;
/// What a guest may take from the host's random numbers, bytes/s: it needs 32 at a time.
pub const ENTROPY_BYTES_PER_S: NonZeroU64 = NonZeroU64::new(64 << 10).unwrap();

const DISK: &str = "disk";
const NET: &str = "net";

/// One request.
pub(super) struct Call {
    /// Names it in errors.
    pub(super) command: &'static str,
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    pub(super) body: Option<Value>,
    /// How long its answer may take.
    pub(super) limit: Duration,
}

fn call(command: &'static str, method: &'static str, path: &'static str, body: Value) -> Call {
    Call {
        command,
        method,
        path,
        body: Some(body),
        limit: API_CALL_MAX,
    }
}

/// Who is there.
pub(super) fn instance() -> Call {
    Call {
        command: "instance-info",
        method: "GET",
        path: "/",
        body: None,
        limit: API_CALL_MAX,
    }
}

/// All that is said before the start, in this order: it fixes the order of the guest's devices,
/// /dev/vda, /dev/vdb.
pub(super) fn machine(spec: &Spec) -> Vec<Call> {
    let paths = &spec.paths;
    let mut calls = vec![
        call(
            "machine-config",
            "PUT",
            "/machine-config",
            json!({
                "vcpu_count": spec.cpus.clamp(1, CPUS_MAX_FIRECRACKER),
                "mem_size_mib": spec.memory_mib.clamp(MEMORY_MIN_MIB, MEMORY_MAX_MIB),
                "smt": false,
                "track_dirty_pages": false,
            }),
        ),
        call(
            "boot-source",
            "PUT",
            "/boot-source",
            json!({
                "kernel_image_path": paths.kernel,
                "initrd_path": paths.initramfs,
                "boot_args": BOOT_ARGS,
            }),
        ),
        call(
            "drives/base",
            "PUT",
            "/drives/base",
            json!({
                "drive_id": "base",
                "path_on_host": paths.image,
                "is_root_device": false,
                "is_read_only": true,
                "io_engine": "Sync",
            }),
        ),
        call(
            "drives/disk",
            "PUT",
            "/drives/disk",
            json!({
                "drive_id": DISK,
                "path_on_host": paths.disk,
                "is_root_device": false,
                "is_read_only": false,
                // The default answers a flush without doing it.
                "cache_type": "Writeback",
                // The other engine is io_uring, which no jail has.
                "io_engine": "Sync",
                "rate_limiter": disk_limiter(&spec.limits),
            }),
        ),
    ];
    if spec.tap {
        calls.push(call(
            "network-interfaces/net",
            "PUT",
            "/network-interfaces/net",
            json!({
                "iface_id": NET,
                "host_dev_name": TAP,
                "guest_mac": GUEST_MAC,
                "rx_rate_limiter": net_limiter(&spec.limits),
                "tx_rate_limiter": net_limiter(&spec.limits),
            }),
        ));
    }
    calls.extend([
        call(
            "vsock",
            "PUT",
            "/vsock",
            json!({"guest_cid": GUEST_CID, "uds_path": paths.vsock}),
        ),
        call(
            "entropy",
            "PUT",
            "/entropy",
            json!({"rate_limiter": limiter(Some(ENTROPY_BYTES_PER_S), None)}),
        ),
        // The kernel is told to have none; a guest that writes to the port all the same writes here.
        call(
            "serial",
            "PUT",
            "/serial",
            json!({"serial_out_path": "/dev/null"}),
        ),
    ]);
    calls
}

/// The kernel's command line. Firecracker adds `pci=off` and where its devices are. A reset by the
/// keyboard's controller is the one that it hears.
pub const BOOT_ARGS: &str = "console=null quiet panic=-1 rdinit=/init rcupdate.rcu_expedited=1 \
     reboot=k 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd";

/// Builds the machine and runs it.
pub(super) fn start() -> Call {
    call(
        "start",
        "PUT",
        "/actions",
        json!({"action_type": "InstanceStart"}),
    )
}

/// Stops the virtual CPUs.
pub(super) fn pause() -> Call {
    call("pause", "PATCH", "/vm", json!({"state": "Paused"}))
}

/// Lets them run.
pub(super) fn resume() -> Call {
    call("resume", "PATCH", "/vm", json!({"state": "Resumed"}))
}

/// Writes the whole state: devices to one file, memory to another.
pub(super) fn snapshot_create(spec: &Spec) -> Call {
    Call {
        limit: MIGRATE_MAX,
        ..call(
            "snapshot/create",
            "PUT",
            "/snapshot/create",
            json!({
                "snapshot_type": "Full",
                "snapshot_path": spec.paths.state,
                "mem_file_path": spec.paths.memory,
            }),
        )
    }
}

/// Takes the state in; memory is mapped from its file, private, so that what the guest writes
/// stays its own. The virtual CPUs stay stopped.
pub(super) fn snapshot_load(spec: &Spec) -> Call {
    Call {
        limit: MIGRATE_MAX,
        ..call(
            "snapshot/load",
            "PUT",
            "/snapshot/load",
            json!({
                "snapshot_path": spec.paths.state,
                "mem_backend": {"backend_type": "File", "backend_path": spec.paths.memory},
                "track_dirty_pages": false,
                "resume_vm": false,
            }),
        )
    }
}

/// Opens the disk's path anew, and tells the guest its size.
pub(super) fn disk_reopen(spec: &Spec) -> Call {
    call(
        "drives/disk",
        "PATCH",
        "/drives/disk",
        json!({"drive_id": DISK, "path_on_host": spec.paths.disk}),
    )
}

/// Sets the disk's limits.
pub(super) fn disk_limit(limits: &Limits) -> Call {
    call(
        "drives/disk",
        "PATCH",
        "/drives/disk",
        json!({"drive_id": DISK, "rate_limiter": disk_limiter(limits)}),
    )
}

/// Sets the link's limits, the same both ways.
pub(super) fn net_limit(limits: &Limits) -> Call {
    call(
        "network-interfaces/net",
        "PATCH",
        "/network-interfaces/net",
        json!({
            "iface_id": NET,
            "rx_rate_limiter": net_limiter(limits),
            "tx_rate_limiter": net_limiter(limits),
        }),
    )
}

fn disk_limiter(limits: &Limits) -> Value {
    limiter(limits.disk_bytes_per_s, limits.disk_ops_per_s)
}

fn net_limiter(limits: &Limits) -> Value {
    limiter(limits.net_bytes_per_s, limits.net_packets_per_s)
}

/// Buckets of one second's worth. A size of 0 takes a limit away; leaving it out would keep the
/// one before.
fn limiter(bytes_per_s: Option<NonZeroU64>, ops_per_s: Option<NonZeroU64>) -> Value {
    let bucket = |rate: Option<NonZeroU64>| json!({"size": rate.map_or(0, NonZeroU64::get), "refill_time": 1000});
    json!({"bandwidth": bucket(bytes_per_s), "ops": bucket(ops_per_s)})
}
