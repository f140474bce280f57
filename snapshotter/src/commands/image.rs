//! `weightfs image`.

use std::sync::Arc;

use anyhow::Context as _;
use weightfs::cli::ImageArgs;
use weightfs::config::Config;
use weightfs::index::{make, present};
use weightfs::model_image::push;

use super::progress::Downloads;
use super::{Scratch, opener, size};

/// Makes the image of a model and pushes it beside the model.
pub async fn run(config: &Config, arguments: ImageArgs) -> anyhow::Result<()> {
    let ImageArgs { reference, tag, index, json } = arguments;
    // Declared first: it must outlive what is open in it.
    let scratch = Scratch::open(config)?;
    let opener = opener(config, Arc::clone(&scratch.store))?;
    if index {
        let artifact = opener.resolve(&reference).await?;
        if present(&opener, &artifact, None).await?.is_none() {
            let reading = Downloads::new("reading layers");
            let made = make(&opener, artifact, None, &reading).await;
            reading.finish();
            made?.push(&opener).await?;
        }
    }
    let downloads = Downloads::new("unpacking compressed layers");
    let pushed = push(&opener, &reference, tag.as_deref(), &downloads).await;
    downloads.finish();
    let pushed = pushed?;
    if json {
        println!("{}", serde_json::to_string_pretty(&pushed).context("JSON")?);
        return Ok(());
    }
    println!("{}@{}", pushed.reference, pushed.digest);
    let (lazy, all, bytes) = (pushed.lazy_layers, pushed.layers, size(pushed.bytes));
    println!("{lazy} of {all} layers lazy, {bytes} uploaded at the most");
    match pushed.index {
        Some(index) => println!("it names the index {index}"),
        None => println!("it names no index; `weightfs image --index` makes one"),
    }
    Ok(())
}
