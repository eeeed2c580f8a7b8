//! `casemate-control`: see the library.

use service::Command;
use tokio::sync::watch;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let boot = service::boot(control::NAME)?;
    match boot.command {
        Command::Init => {
            control::init(&boot.paths, &boot.config).await?;
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
            control::run(&boot.paths, &boot.config, boot.clock, stopped).await
        }
    }
}
