//! `casemate-host`: see the library.

use service::Command;
use tokio::sync::watch;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let boot = service::boot(host::NAME)?;
    match boot.command {
        Command::Init => {
            host::init(&boot.paths)?;
            service::print_trust(&[].into());
            Ok(())
        }
        Command::Run => {
            let (stop, stopped) = watch::channel(false);
            tokio::spawn(async move {
                service::stop_requested().await;
                // The receivers are gone only when the daemon ends anyway.
                let _ = stop.send(true);
            });
            host::run(&boot.paths, &boot.config, boot.clock, stopped).await
        }
    }
}
