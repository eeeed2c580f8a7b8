//! The firewall of the fabric: one table, changed in single transactions through libnftables in
//! this process (no program is run).
//!
//! Nothing passes but a triple (who, to which guest, which port) that is in a set, and answers to
//! it: the reverse direction looks the same triple up again, so that closing it cuts what is
//! under way. Spoofed addresses fall before that; IPv6 always; ARP but for the guest's own.
//!
//! A slot's rates are elements of sets that are looked up by its tap: a token bucket each for bytes
//! and packets, each way, that holds one second's worth (of bytes [`BURST_BYTES`] more). What is
//! above is dropped before anything else is done with it, counted. ARP has a bucket of its own.
//! Must never be given text: all that goes into a command is made of numbers here.

use crate::network::{Network, mac, mac_text, tap_name};
use crate::wire::{Drops, Rules};
use api::Error;
use api::warden::{NetRates, Open, Source};
use jail::fault::{At, Result};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt::Write as _;

/// What a bucket of bytes holds beyond one second's worth: one segment as large as a guest's
/// network card may send passes the lowest rate.
const BURST_BYTES: u64 = 128 << 10;
/// The kernel counts tokens in 64 bits of nanoseconds times bytes: what is above it can't count.
const _: () = assert!(
    (*model::limits::NET_BYTES_PER_S.end() + BURST_BYTES) as u128 * 1_000_000_000
        < u64::MAX as u128
);

/// The firewall.
pub struct Nft {
    lib: Lib,
    network: Network,
    edge_uid: u32,
}

impl Nft {
    /// Loads the library, for the network namespace of the calling thread.
    ///
    /// # Errors
    /// When libnftables is not installed.
    pub fn open(network: Network, edge_uid: u32) -> Result<Self> {
        Ok(Self {
            lib: Lib::load().at("load", "libnftables.so.1 (install libnftables1)")?,
            network,
            edge_uid,
        })
    }

    /// Replaces the whole table by one that holds exactly these slots and their rules.
    ///
    /// # Errors
    /// libnftables' complaint; the old table stands then.
    pub fn rebuild(&mut self, slots: &BTreeMap<u16, Rules>) -> Result {
        let mut commands = self.base();
        for (slot, rules) in slots {
            self.slot_elements(&mut commands, "add", *slot);
            self.open_elements(&mut commands, "add", *slot, &rules.open);
            rate_elements(&mut commands, "add", *slot, rules.rates);
        }
        self.lib
            .run(&commands)
            .map(drop)
            .at("rebuild", "the firewall")
    }

    /// Lets the slot's own addresses in, and counts its drops; opens and bounds nothing.
    ///
    /// # Errors
    /// libnftables' complaint; nothing has changed then.
    pub fn slot_add(&mut self, slot: u16) -> Result {
        let mut commands = String::new();
        self.slot_elements(&mut commands, "add", slot);
        self.lib
            .run(&commands)
            .map(drop)
            .at("firewall in slot", slot)
    }

    /// Takes the slot and its rules out.
    ///
    /// # Errors
    /// libnftables' complaint; nothing has changed then.
    pub fn slot_remove(&mut self, slot: u16, rules: &Rules) -> Result {
        let mut commands = String::new();
        // Added first, so that an element that is not there is no error: removing is idempotent.
        for verb in ["add", "delete"] {
            self.open_elements(&mut commands, verb, slot, &rules.open);
            rate_elements(&mut commands, verb, slot, ANY_RATES);
            self.slot_elements(&mut commands, verb, slot);
        }
        self.lib
            .run(&commands)
            .map(drop)
            .at("firewall out slot", slot)
    }

    /// Replaces the slot's rules.
    ///
    /// # Errors
    /// libnftables' complaint; nothing has changed then.
    pub fn set(&mut self, slot: u16, old: &Rules, new: &Rules) -> Result {
        let mut commands = String::new();
        self.open_elements(&mut commands, "add", slot, &old.open);
        self.open_elements(&mut commands, "delete", slot, &old.open);
        self.open_elements(&mut commands, "add", slot, &new.open);
        // Left alone where they stay as they are: a new bucket is a full one.
        if old.rates != new.rates {
            rate_elements(&mut commands, "add", slot, ANY_RATES);
            rate_elements(&mut commands, "delete", slot, ANY_RATES);
            rate_elements(&mut commands, "add", slot, new.rates);
        }
        self.lib
            .run(&commands)
            .map(drop)
            .at("set the rules of slot", slot)
    }

    /// Packets dropped.
    ///
    /// # Errors
    /// libnftables' complaint.
    pub fn dropped(&mut self, slot: u16) -> Result<Drops> {
        let mut one = |set: &str| -> Result<u64> {
            let command = format!(
                "get element inet casemate {set} {{ \"{}\" }}",
                tap_name(slot)
            );
            let text = self.lib.run(&command).at("count drops of slot", slot)?;
            let number = text
                .split_once("counter packets ")
                .and_then(|(_, n)| n.split(' ').next()?.parse().ok());
            Ok(number.unwrap_or(0))
        };
        Ok(Drops {
            inward: one("drop_in")?,
            outward: one("drop_out")?,
            inward_limited: one("limited_in")?,
            outward_limited: one("limited_out")?,
        })
    }

    fn base(&self) -> String {
        let edge = self.edge_uid;
        format!(
            r#"add table inet casemate
delete table inet casemate
add table arp casemate
delete table arp casemate
table inet casemate {{
 set open {{ typeof oifname . ip daddr . ip saddr . tcp dport; }}
 set links {{ typeof iifname . oifname . ip daddr . ip saddr . tcp dport; }}
 set pins {{ typeof iifname . ether saddr . ip saddr; }}
 set drop_in {{ typeof oifname; counter; }}
 set drop_out {{ typeof iifname; counter; }}
 set bytes_in {{ typeof oifname; limit rate over 1 bytes/second; }}
 set bytes_out {{ typeof iifname; limit rate over 1 bytes/second; }}
 set packets_in {{ typeof oifname; limit rate over 1/second; }}
 set packets_out {{ typeof iifname; limit rate over 1/second; }}
 set limited_in {{ typeof oifname; counter; }}
 set limited_out {{ typeof iifname; counter; }}
 chain prerouting {{ type filter hook prerouting priority raw; policy drop;
  iifname "lo" accept
  iifname @packets_out iifname @limited_out drop
  iifname @bytes_out iifname @limited_out drop
  meta nfproto ipv4 iifname . ether saddr . ip saddr @pins accept
  iifname @drop_out drop
 }}
 chain output {{ type filter hook output priority filter; policy drop;
  oifname "lo" accept
  ct state new meta skuid {edge} oifname . ip daddr . ip saddr . tcp dport @open accept
  ct state established ct direction original oifname . ip daddr . ip saddr . tcp dport @open accept
  oifname @drop_in drop
 }}
 chain input {{ type filter hook input priority filter; policy drop;
  iifname "lo" accept
  ct state established ct direction reply iifname . ip saddr . ip daddr . tcp sport @open accept
  iifname @drop_out drop
 }}
 chain forward {{ type filter hook forward priority filter; policy drop;
  ct state new,established ct direction original iifname . oifname . ip daddr . ip saddr . tcp dport @links accept
  ct state established ct direction reply oifname . iifname . ip saddr . ip daddr . tcp sport @links accept
  oifname @drop_in continue
  iifname @drop_out drop
 }}
 chain postrouting {{ type filter hook postrouting priority filter; policy accept;
  oifname @packets_in oifname @limited_in drop
  oifname @bytes_in oifname @limited_in drop
 }}
}}
table arp casemate {{
 set packets_out {{ typeof iifname; limit rate over 1/second; }}
 set pins {{ typeof iifname . ether saddr . arp saddr ether . arp saddr ip; }}
 chain input {{ type filter hook input priority filter; policy drop;
  iifname @packets_out drop
  arp operation request iifname . ether saddr . arp saddr ether . arp saddr ip @pins accept
 }}
 chain output {{ type filter hook output priority filter; policy drop;
  arp operation reply accept
 }}
}}
"#
        )
    }

    fn slot_elements(&self, out: &mut String, verb: &str, slot: u16) {
        let (tap, ip) = (tap_name(slot), self.network.guest(slot));
        let mac = mac_text(mac(ip));
        for (table, element) in [
            ("inet casemate pins", format!("\"{tap}\" . {mac} . {ip}")),
            (
                "arp casemate pins",
                format!("\"{tap}\" . {mac} . {mac} . {ip}"),
            ),
            ("inet casemate drop_in", format!("\"{tap}\"")),
            ("inet casemate drop_out", format!("\"{tap}\"")),
            ("inet casemate limited_in", format!("\"{tap}\"")),
            ("inet casemate limited_out", format!("\"{tap}\"")),
        ] {
            let _ = writeln!(out, "{verb} element {table} {{ {element} }}");
        }
    }

    fn open_elements(&self, out: &mut String, verb: &str, slot: u16, open: &[Open]) {
        let (tap, ip) = (tap_name(slot), self.network.guest(slot));
        for Open { source, port } in open {
            let _ = match source {
                Source::Edge => {
                    let from = self.network.gateway();
                    writeln!(
                        out,
                        "{verb} element inet casemate open {{ \"{tap}\" . {ip} . {from} . {port} }}"
                    )
                }
                Source::Slot(s) => {
                    let (from_tap, from) = (tap_name(*s), self.network.guest(*s));
                    writeln!(
                        out,
                        "{verb} element inet casemate links {{ \"{from_tap}\" . \"{tap}\" . {ip} . {from} . {port} }}"
                    )
                }
            };
        }
    }
}

/// Names every element that bounds a slot, whatever its rates are: to delete them.
const ANY_RATES: NetRates = NetRates {
    bytes_per_s: 1,
    packets_per_s: 1,
};

fn rate_elements(out: &mut String, verb: &str, slot: u16, rates: NetRates) {
    let tap = tap_name(slot);
    let NetRates {
        bytes_per_s: bytes,
        packets_per_s: packets,
    } = rates;
    let limits = [
        (
            bytes,
            format!("{bytes} bytes/second burst {BURST_BYTES} bytes"),
        ),
        (packets, format!("{packets}/second burst {packets} packets")),
    ];
    for (table, (rate, limit)) in [
        ("inet casemate bytes_in", &limits[0]),
        ("inet casemate bytes_out", &limits[0]),
        ("inet casemate packets_in", &limits[1]),
        ("inet casemate packets_out", &limits[1]),
        ("arp casemate packets_out", &limits[1]),
    ] {
        if *rate > 0 {
            let _ = writeln!(
                out,
                "{verb} element {table} {{ \"{tap}\" limit rate over {limit} }}"
            );
        }
    }
}

type Ctx = *mut c_void;

/// libnftables, loaded by name: no development package is needed to build.
struct Lib {
    ctx: Ctx,
    run: unsafe extern "C" fn(Ctx, *const c_char) -> c_int,
    output: unsafe extern "C" fn(Ctx) -> *const c_char,
    error: unsafe extern "C" fn(Ctx) -> *const c_char,
}

// SAFETY: a context belongs to no thread; `&mut self` keeps it to one at a time.
unsafe impl Send for Lib {}

impl Lib {
    fn load() -> std::result::Result<Self, Error> {
        // SAFETY: the arguments are a NUL-terminated name and a flag.
        let lib = unsafe { libc::dlopen(c"libnftables.so.1".as_ptr(), libc::RTLD_NOW) };
        if lib.is_null() {
            return Err(Error::internal("the dynamic loader does not find it"));
        }
        let symbol = |name: &CStr| {
            // SAFETY: `lib` is a handle that is never closed.
            let p = unsafe { libc::dlsym(lib, name.as_ptr()) };
            if p.is_null() {
                Err(Error::internal(format!("{name:?} is not in it")))
            } else {
                Ok(p)
            }
        };
        // SAFETY: these are the prototypes of <nftables/libnftables.h>, stable within .so.1.
        unsafe {
            type Get = unsafe extern "C" fn(Ctx) -> *const c_char;
            type Set = unsafe extern "C" fn(Ctx) -> c_int;
            let new: unsafe extern "C" fn(u32) -> Ctx =
                std::mem::transmute(symbol(c"nft_ctx_new")?);
            let buffer_output: Set = std::mem::transmute(symbol(c"nft_ctx_buffer_output")?);
            let buffer_error: Set = std::mem::transmute(symbol(c"nft_ctx_buffer_error")?);
            let run: unsafe extern "C" fn(Ctx, *const c_char) -> c_int =
                std::mem::transmute(symbol(c"nft_run_cmd_from_buffer")?);
            let output: Get = std::mem::transmute(symbol(c"nft_ctx_get_output_buffer")?);
            let error: Get = std::mem::transmute(symbol(c"nft_ctx_get_error_buffer")?);
            let ctx = new(0);
            if ctx.is_null() || buffer_output(ctx) != 0 || buffer_error(ctx) != 0 {
                return Err(Error::internal("it gives no context"));
            }
            Ok(Self {
                ctx,
                run,
                output,
                error,
            })
        }
    }

    /// Runs commands as one transaction.
    fn run(&mut self, commands: &str) -> std::result::Result<String, String> {
        let text = CString::new(commands).map_err(|e| e.to_string())?;
        // SAFETY: `ctx` lives as long as `self`, `text` over the call; the buffers are strings
        // that are valid until the next call.
        unsafe {
            let code = (self.run)(self.ctx, text.as_ptr());
            let read = |p: *const c_char| {
                if p.is_null() {
                    String::new()
                } else {
                    CStr::from_ptr(p).to_string_lossy().into_owned()
                }
            };
            let (output, error) = (read((self.output)(self.ctx)), read((self.error)(self.ctx)));
            if code == 0 { Ok(output) } else { Err(error) }
        }
    }
}
