//! `casemate-warden`: root behind a closed enum of requests.
//!
//! `init` makes the machine's key; `run` serves.

use anyhow::{Context as _, bail};
use net::Network;
use std::path::PathBuf;
use warden::{Config, Layout, Vmm, Warden};

fn main() -> anyhow::Result<()> {
    start(std::env::args().skip(1)).map_err(|e| {
        match e
            .downcast_ref::<api::Error>()
            .and_then(|e| e.detail.clone())
        {
            // What the client would not be told is what the operator needs.
            Some(detail) => e.context(detail),
            None => e,
        }
    })
}

fn start(mut args: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let (mut root, mut act) = (PathBuf::new(), "run".to_owned());
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--root" => root = value()?.into(),
            "init" | "run" => act = arg,
            _ => bail!("usage: casemate-warden [--root DIR] [run|init]"),
        }
    }
    let layout = Layout::new(&root);
    if act == "init" {
        println!("{}", warden::Machine::init(&layout)?.trust());
        return Ok(());
    }
    let config = warden::layout::read_small(&layout.config())?;
    let network = Network::from_config(&config.unwrap_or_default())
        .with_context(|| format!("read {}", layout.config().display()))?;
    run(layout, network)
}

fn run(layout: Layout, network: Network) -> anyhow::Result<()> {
    let stop = jail::process::signals()?;
    let uids = warden::server::uids(&layout)?;
    let uid = |name: &str| {
        uids.get(name)
            .copied()
            .with_context(|| format!("uids.json has no {name:?}"))
    };
    let host_uid = uid("host")?;
    layout.create()?;
    let firecracker = warden::layout::found(&layout)?;
    let vmm = Vmm::probe(layout.root(), &layout.state(), &firecracker)?;
    let programs = std::env::current_exe()?;
    let programs = programs
        .parent()
        .context("the program is in no directory")?
        .to_owned();
    let warden = Warden::open(Config {
        layout: layout.clone(),
        network,
        edge_uid: uid("edge")?,
        host_uid,
        programs,
        vmm,
        fail_at: None,
    })?;
    let listener = warden::server::bind(&layout)?;
    warden::server::serve(&warden, &listener, host_uid, &stop)?;
    // Workspaces outlive an upgrade of warden; only a drain ends them.
    if layout.own_run().join("drain").exists() {
        warden.close_all();
    }
    Ok(())
}
