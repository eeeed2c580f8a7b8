//! Images.

use super::App;
use crate::op::Op;
use api::host::Image;

/// Images of the machine, those whose name or description holds `search`.
///
/// # Errors
/// [`api::ErrorCode::VmUnavailable`] if no machine answers.
pub async fn image_list(app: &App, op: &Op, search: Option<&str>) -> api::Result<Vec<Image>> {
    op.client()?;
    let wanted = search.unwrap_or_default().to_lowercase();
    let mut images = app.host_info(op).await?.images;
    images.retain(|i| {
        i.name.to_lowercase().contains(&wanted) || i.description.to_lowercase().contains(&wanted)
    });
    Ok(images)
}
