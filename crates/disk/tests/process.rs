//! The process as warden runs it: a real mount, attached nowhere, and a file opened through it.
//! Needs root.
#![allow(clippy::unwrap_used)]

mod world;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

use api::disk::{FromDisk, ToDisk};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use world::*;

#[test]
fn i8_written_data_is_there_after_a_new_start_and_only_ciphertext_at_rest() {
    let canary = b"the quick brown canary 8b51b4a1";
    let backing = at_rest();
    let template = file_with(
        &[(0, b"template superblock"), (8 << 20, &[7; 10_000])],
        32 << 20,
    );
    {
        let disk = Disk::started(&backing, Some(&template), &fresh());
        let file = disk.open().unwrap();
        let stat = {
            let file = file.try_clone().unwrap();
            as_uid(UID, move || file.metadata().unwrap())
        };
        assert_eq!((stat.len(), stat.uid()), (VOLUME + (SIZE_MB << 20), UID));
        assert_eq!(&read(&file, VOLUME, 19), b"template superblock");
        assert_eq!(read(&file, VOLUME + (8 << 20), 10_000), [7; 10_000]);
        assert_eq!(read(&file, VOLUME + (16 << 20), 4096), [0; 4096]);
        assert_eq!(&read(&file, 0, 8), api::agent::IDENTITY_MAGIC);

        let big: Vec<u8> = (0..3u32 << 20).map(|at| (at * 7 / 5) as u8).collect();
        file.write_all_at(&big, VOLUME + (20 << 20)).unwrap();
        file.write_all_at(canary, VOLUME + 12_345).unwrap(); // In no way aligned.
        file.sync_data().unwrap();
        assert_eq!(read(&file, VOLUME + (20 << 20), big.len()), big);
        assert_eq!(&read(&file, VOLUME + 12_345, canary.len()), canary);

        let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        assert_eq!(errno(file.write_all_at(b"x", 0)), Some(libc::EPERM));
        assert_eq!(
            errno(file.write_all_at(&[1; 8192], VOLUME - 4096)),
            Some(libc::EPERM)
        );
        let end = VOLUME + (SIZE_MB << 20);
        assert_eq!(errno(file.write_all_at(b"x", end)), Some(libc::EFBIG));
        assert_eq!(file.read_at(&mut [0; 8], end).unwrap(), 0);
        assert_eq!(file.read_at(&mut [0; 8], end - 3).unwrap(), 3);
        drop(file);
        disk.close();
    }
    let disk = Disk::started(&backing, None, &Plan::default());
    let file = disk.open().unwrap();
    assert_eq!(&read(&file, VOLUME + 12_345, canary.len()), canary);
    drop(file);
    disk.close();
    for plain in [
        &canary[..],
        b"template superblock",
        b"CMIDENT1",
        &"1b".repeat(32).into_bytes(),
    ] {
        assert!(!holds(&backing, plain), "plaintext at rest");
    }
}

#[test]
fn the_file_is_opened_once_and_by_its_owner_only() {
    let backing = at_rest();
    let disk = Disk::started(&backing, None, &fresh());
    let path = format!("/proc/self/fd/{}", disk.mount.as_ref().unwrap().as_raw_fd());
    let open_as = |uid: u32| {
        let path = path.clone();
        as_uid(uid, move || File::open(path))
            .map(drop)
            .unwrap_err()
            .raw_os_error()
    };
    assert_eq!(open_as(0), Some(libc::EACCES), "root is no exception");
    assert_eq!(open_as(DISK_UID), Some(libc::EACCES));
    let file = disk.open().unwrap();
    assert_eq!(open_as(UID), Some(libc::EBUSY));
    drop(file);
    assert_eq!(
        open_as(UID),
        Some(libc::EBUSY),
        "not even after it was closed"
    );
    disk.close();
}

#[test]
fn without_a_volume_the_file_is_empty_and_then_it_is_there() {
    let backing = at_rest();
    let disk = Disk::spawn(&fresh());
    let FromDisk::Hello { hpke_pub } = disk.receive() else {
        panic!("no hello")
    };
    let file = disk.open().unwrap();
    let len = |file: &File| {
        let file = file.try_clone().unwrap();
        as_uid(UID, move || {
            rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).unwrap()
        })
    };
    let errno = |result: io::Result<()>| result.unwrap_err().raw_os_error();
    assert_eq!(len(&file), 0);
    assert_eq!(errno(file.write_all_at(b"x", 0)), Some(libc::EIO));
    assert_eq!(errno(file.read_exact_at(&mut [0; 8], 0)), Some(libc::EIO));
    disk.send_files(&backing, None, &fresh());
    assert_eq!(errno(file.write_all_at(b"x", VOLUME)), Some(libc::EIO));
    disk.send(&grant(&hpke_pub, &fresh()));
    assert!(matches!(disk.receive(), FromDisk::Ready { .. }));
    assert_eq!(len(&file), VOLUME + (SIZE_MB << 20));
    file.write_all_at(b"x", VOLUME).unwrap();
    assert_eq!(read(&file, VOLUME, 1), b"x");
    drop(file);
    disk.close();
}

#[test]
fn messages_out_of_turn_or_without_files_end_the_process() {
    for files in [0, 3] {
        let file = at_rest();
        let mut disk = Disk::spawn(&fresh());
        assert!(matches!(disk.receive(), FromDisk::Hello { .. }));
        if files == 0 {
            disk.send(&ToDisk::Open {
                content: api::disk::Content::Disk,
                size_mb: 64,
                bytes_per_s: 1 << 30,
                ops_per_s: 1000,
            });
        } else {
            let wrong = Plan {
                ops_per_s: 0,
                ..fresh()
            };
            disk.send_files(&file, None, &wrong);
        }
        let FromDisk::Failed { message, .. } = disk.receive() else {
            panic!("{files}")
        };
        let named = if files == 0 { "files" } else { "ops_per_s" };
        assert!(message.starts_with(named), "{message}");
        assert!(!wait(&mut disk.child).success());
    }
    let mut disk = Disk::spawn(&fresh());
    let FromDisk::Hello { hpke_pub } = disk.receive() else {
        panic!("no hello")
    };
    disk.send(&grant(&hpke_pub, &fresh()));
    assert!(matches!(disk.receive(), FromDisk::Failed { .. }));
    assert!(!wait(&mut disk.child).success());
}

#[test]
fn discarded_ranges_are_zeros_and_take_no_space() {
    let backing = at_rest();
    let disk = Disk::started(&backing, None, &fresh());
    let file = disk.open().unwrap();
    let at = VOLUME + (4 << 20);
    file.write_all_at(&vec![0xab; 2 << 20], at).unwrap();
    file.sync_data().unwrap();
    let before = backing.metadata().unwrap().blocks();
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    // Above 1 MiB, so that it is a hole and not zeros.
    rustix::fs::fallocate(&file, flags, at + 100, (2 << 20) - 200).unwrap();
    assert_eq!(read(&file, at, 100), [0xab; 100]);
    assert_eq!(
        read(&file, at + 100, (2 << 20) - 200),
        vec![0; (2 << 20) - 200]
    );
    assert_eq!(read(&file, at + (2 << 20) - 100, 100), [0xab; 100]);
    assert!(backing.metadata().unwrap().blocks() < before - 1000);

    file.write_all_at(&[0xcd; 8192], at).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::ZERO_RANGE, at, 8192).unwrap();
    assert_eq!(read(&file, at, 8192), [0; 8192]);
    let plain = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), at, 8192);
    assert_eq!(plain, Err(rustix::io::Errno::OPNOTSUPP));
    let identity = rustix::fs::fallocate(&file, flags, 0, 4096);
    assert_eq!(identity, Err(rustix::io::Errno::PERM));
    drop(file);
    disk.close();
}

#[test]
fn failures_have_their_code_and_end_the_process() {
    let backing = at_rest();
    Disk::started(&backing, None, &fresh()).close();
    let failed = |backing: &AtRest, plan: &Plan, with_template: Option<&File>| {
        let (mut disk, answer) = Disk::start(backing, with_template, plan);
        let FromDisk::Failed { code, message } = answer else {
            panic!("{answer:?}")
        };
        assert!(!wait(&mut disk.child).success());
        assert!(!message.contains("1111"), "{message}");
        code
    };
    use api::ErrorCode::{DiskCorrupt, DiskTampered, KeyRefused};
    let other = Plan {
        disk_key: [0x22; 32],
        ..Plan::default()
    };
    assert_eq!(failed(&backing, &other, None), DiskTampered);
    assert_eq!(
        failed(&backing, &fresh(), None),
        DiskCorrupt,
        "never over a volume"
    );
    let blank = at_rest();
    assert_eq!(failed(&blank, &Plan::default(), None), DiskTampered);
    let huge = file_with(&[(0, b"x")], (SIZE_MB + 1) << 20);
    assert_eq!(failed(&blank, &fresh(), Some(&huge)), DiskCorrupt);
    assert!(blank.metadata().unwrap().len() == 0 || !holds(&blank, b"LUKS\xba\xbe"));

    let disk = Disk::spawn(&Plan::default());
    let FromDisk::Hello { .. } = disk.receive() else {
        panic!("no hello")
    };
    disk.send_files(&backing, None, &Plan::default());
    let stranger = seal::hpke::SecretKey::generate().public().to_hex();
    disk.send(&grant(&stranger, &Plan::default()));
    let FromDisk::Failed { code, .. } = disk.receive() else {
        panic!("a stranger's grant")
    };
    assert_eq!(code, KeyRefused);
}

#[test]
fn a_killed_process_ends_the_mount_and_keeps_what_was_synced() {
    let backing = at_rest();
    let mut disk = Disk::started(&backing, None, &fresh());
    let file = disk.open().unwrap();
    file.write_all_at(b"kept", VOLUME).unwrap();
    file.sync_data().unwrap();
    disk.child.kill().unwrap();
    wait(&mut disk.child);
    let error = file
        .read_at(&mut [0; 4], VOLUME)
        .unwrap_err()
        .raw_os_error();
    assert!(
        matches!(error, Some(libc::ENOTCONN | libc::ECONNABORTED | libc::EIO)),
        "{error:?}"
    );
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("casemate-test"), "a mount is attached");
    drop((file, disk));

    let disk = Disk::started(&backing, None, &Plan::default());
    assert_eq!(&read(&disk.open().unwrap(), VOLUME, 4), b"kept");
    disk.close();
}

#[test]
fn it_ends_by_itself_when_warden_or_the_mount_is_gone() {
    let backing = at_rest();
    let mut disk = Disk::started(&backing, None, &fresh());
    let file = disk.open().unwrap();
    file.write_all_at(b"written, not synced", VOLUME).unwrap();
    drop(file);
    disk.mount = None;
    assert!(wait(&mut disk.child).success(), "the mount is gone");

    let mut disk = Disk::started(&backing, None, &Plan::default());
    let file = disk.open().unwrap();
    assert_eq!(&read(&file, VOLUME, 7), b"written");
    disk.control = None;
    assert!(wait(&mut disk.child).success(), "warden is gone");
}

#[test]
fn it_serves_inside_its_sandbox() {
    let backing = at_rest();
    let disk = Disk::started(&backing, None, &fresh());
    let proc = format!("/proc/{}", disk.child.id());
    let mut threads = 0;
    for thread in std::fs::read_dir(format!("{proc}/task")).unwrap() {
        let status = std::fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        for line in ["Seccomp:\t2", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"] {
            assert!(status.contains(line), "{line} in\n{status}");
        }
        threads += 1;
    }
    // The first, the workers, and the one that drains.
    assert_eq!(threads, 2 + disk::limits::WORKERS);
    let mut open: Vec<_> = std::fs::read_dir(format!("{proc}/fd"))
        .unwrap()
        .map(|fd| fd.unwrap().file_name().into_string().unwrap())
        .collect();
    open.sort();
    assert_eq!(open, ["0", "1", "2", "3", "4", "5", "6", "7", "8"]);
    disk.close();
}

#[test]
fn it_says_how_far_the_disk_has_got_when_asked_and_at_its_end_whatever_the_reason() {
    let backing = at_rest();
    let disk = Disk::started(&backing, None, &fresh());
    let file = disk.open().unwrap();
    let ask = || {
        disk.send(&ToDisk::Anchor);
        disk.anchored().statement
    };
    let first = ask();
    assert_eq!(ask(), first, "nothing was written");
    file.write_all_at(&[1; 4096], VOLUME).unwrap();
    file.sync_data().unwrap();
    let second = ask();
    let order = |s: &api::kms::AnchorStatement| (s.anchor.run, s.anchor.batch);
    assert!(order(&second) > order(&first));
    assert_ne!(second.mac, first.mac);
    file.write_all_at(&[2; 4096], VOLUME).unwrap();
    drop(file);
    let last = disk.close();
    assert!(
        order(&last.statement) > order(&second),
        "with what was not flushed"
    );
    assert_eq!((last.refused, last.first_refused), (0, None));

    // Of that state, and of no older one, it opens; and the mount's end is an end as well.
    let plan = Plan {
        anchor: Some(last.statement.anchor.clone()),
        ..Plan::default()
    };
    let mut disk = Disk::started(&backing, None, &plan);
    let file = disk.open().unwrap();
    assert_eq!(read(&file, VOLUME, 1), [2]);
    file.write_all_at(&[3; 4096], VOLUME).unwrap();
    drop(file);
    disk.mount = None;
    assert!(wait(&mut disk.child).success());
    let end = disk.anchored();
    assert!(order(&end.statement) > order(&last.statement));
}

#[test]
fn what_was_changed_at_rest_is_not_answered_and_is_counted() {
    let backing = at_rest();
    let disk = Disk::started(&backing, None, &fresh());
    let file = disk.open().unwrap();
    file.write_all_at(&[1; 64 << 10], VOLUME + (8 << 20))
        .unwrap();
    drop(file);
    disk.close();
    let at = disk::limits::DATA_OFFSET_BYTES + (8 << 20) + 3 * 4096 + 77;
    let mut byte = [0];
    backing.read_exact_at(&mut byte, at).unwrap();
    backing.write_all_at(&[byte[0] ^ 1], at).unwrap();

    let disk = Disk::started(&backing, None, &Plan::default());
    let file = disk.open().unwrap();
    let read_at = |sector: u64| file.read_at(&mut [0; 4096], VOLUME + (8 << 20) + sector * 4096);
    assert_eq!(read_at(2).unwrap(), 4096);
    assert_eq!(read_at(3).unwrap_err().raw_os_error(), Some(libc::EIO));
    disk.send(&ToDisk::Anchor);
    let said = disk.anchored();
    assert_eq!(
        (said.refused, said.first_refused),
        (1, Some((8 << 20) / 4096 + 3))
    );
}

/// What root can read of the process while it serves: no key, nor the guest's identity.
#[test]
fn no_secret_is_in_its_readable_memory() {
    let backing = at_rest();
    let disk_key: [u8; 32] = seal::random::bytes();
    let plan = Plan {
        disk_key,
        ..fresh()
    };
    let disk = Disk::started(&backing, None, &plan);
    let file = disk.open().unwrap();
    file.write_all_at(&[1; 5000], VOLUME + 77).unwrap();
    read(&file, VOLUME, 8192);
    assert!(
        read(&file, 0, 4096)
            .windows(64)
            .any(|window| window == [b'1', b'b'].repeat(32))
    );
    let workspace = "ws_0123456789abcdef".parse().unwrap();
    let disk_key_in_memory = disk::luks2::DiskKey::from_slice(&disk_key).unwrap();
    let key = disk::luks2::open(&backing.volume, &disk_key_in_memory, &workspace).unwrap();
    let secrets: [(&str, Vec<u8>); 6] = [
        ("disk key", disk_key.to_vec()),
        ("passphrase", hex::encode(disk_key).into()),
        ("data key", key.expose()[..32].to_vec()),
        ("tweak key", key.expose()[32..].to_vec()),
        ("identity seed", "1b".repeat(32).into()),
        (
            "something that is there, to see that this looks",
            b"casemate-disk".to_vec(),
        ),
    ];
    let mut seen = Vec::new();
    for part in readable_memory(disk.child.id()) {
        for (name, secret) in &secrets {
            if part.windows(secret.len()).any(|window| window == secret) {
                seen.push(*name);
            }
        }
    }
    seen.dedup();
    assert_eq!(
        seen.iter()
            .filter(|name| !name.starts_with("something"))
            .count(),
        0,
        "{seen:?}"
    );
    assert!(!seen.is_empty(), "nothing was looked at");
    disk.close();
}

/// All memory of a process that the kernel shows.
fn readable_memory(pid: u32) -> Vec<Vec<u8>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut parts = Vec::new();
    for line in maps
        .lines()
        .filter(|line| line.split(' ').nth(1).unwrap().starts_with("rw"))
    {
        let (from, to) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let [from, to] = [from, to].map(|at| u64::from_str_radix(at, 16).unwrap());
        let mut part = vec![0; usize::try_from(to - from).unwrap()];
        if memory.read_exact_at(&mut part, from).is_ok() {
            parts.push(part);
        }
    }
    parts
}

#[test]
fn one_queue_is_enough_and_the_second_may_be_joined_already() {
    for second_queue in [SecondQueue::None, SecondQueue::ToJoin, SecondQueue::Joined] {
        let backing = at_rest();
        let disk = Disk::started(
            &backing,
            None,
            &Plan {
                second_queue,
                ..fresh()
            },
        );
        let file = disk.open().unwrap();
        let pattern = |byte: u8| vec![byte; 300_000];
        std::thread::scope(|scope| {
            for byte in 1..5u8 {
                let file = &file;
                scope.spawn(move || {
                    let at = VOLUME + u64::from(byte) * 300_000;
                    file.write_all_at(&pattern(byte), at).unwrap();
                    assert_eq!(read(file, at, 300_000), pattern(byte));
                });
            }
        });
        drop(file);
        disk.close();
    }
}

/// DSK-5. Not a time that must be kept, but one that can't be undercut.
#[test]
fn the_rates_hold() {
    let backing = at_rest();
    Disk::started(&backing, None, &fresh()).close();
    for (plan, bytes, ops) in [
        (
            Plan {
                bytes_per_s: 4 << 20,
                ..Plan::default()
            },
            2 << 20,
            2,
        ),
        (
            Plan {
                ops_per_s: 20,
                ..Plan::default()
            },
            4096,
            12,
        ),
    ] {
        let disk = Disk::started(&backing, None, &plan);
        let file = disk.open().unwrap();
        let start = Instant::now();
        for _ in 0..ops {
            read(&file, VOLUME, bytes / ops);
        }
        let at_least = (bytes as f64 / plan.bytes_per_s as f64)
            .max(ops as f64 / plan.ops_per_s as f64)
            - disk::limits::BURST_NS as f64 / 1e9;
        assert!(
            start.elapsed().as_secs_f64() >= at_least,
            "faster than the limit"
        );
        drop(file);
        disk.close();
    }
}

/// Two files on a tmpfs of so many bytes, attached nowhere.
fn file_on_small_storage(size_bytes: u64) -> (File, File) {
    let fs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    rustix::mount::fsconfig_set_string(&fs, "size", size_bytes.to_string()).unwrap();
    rustix::mount::fsconfig_create(&fs).unwrap();
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let mount = rustix::mount::fsmount(&fs, flags, MountAttrFlags::empty()).unwrap();
    let (flags, mode) = (
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CREATE,
        0o600.into(),
    );
    let open = |name| {
        rustix::fs::openat(&mount, name, flags, mode)
            .unwrap()
            .into()
    };
    (open("disk"), open("filler"))
}

#[test]
fn full_storage_is_enospc_to_the_guest_and_its_own_code_to_warden() {
    let tiny = at_rest_in(file_on_small_storage(100 << 10).0);
    let (_disk, answer) = Disk::start(&tiny, None, &fresh());
    let FromDisk::Failed { code, .. } = answer else {
        panic!("{answer:?}")
    };
    assert_eq!(code, api::ErrorCode::StorageFull);

    let (volume, filler) = file_on_small_storage(24 << 20);
    filler.set_len(0).unwrap();
    rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, 20 << 20).unwrap();
    let backing = at_rest_in(volume);
    let disk = Disk::started(&backing, None, &fresh());
    let file = disk.open().unwrap();
    file.write_all_at(b"kept", VOLUME).unwrap();
    // More than waits in the process's memory.
    let full = file
        .write_all_at(&vec![1; 18 << 20], VOLUME + (8 << 20))
        .unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    let full = file.sync_data().unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    // Nothing is lost: when there is room again, it goes on.
    filler.set_len(0).unwrap();
    file.write_all_at(&[2; 1 << 20], VOLUME + (1 << 20))
        .unwrap();
    file.sync_data().unwrap();
    assert_eq!(read(&file, VOLUME + (1 << 20), 4), [2; 4]);
    assert_eq!(&read(&file, VOLUME, 4), b"kept");
    drop(file);
    disk.close();
}
