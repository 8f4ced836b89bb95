//! A client for one bucket: address, trust, credentials.
//!
//! Invariants: the SDK neither retries nor ends a slow body by itself (`attempt` does, by deadlines), and adds no checksums
//! that older servers stumble over. TLS is rustls with ring; without TLS none of it is loaded.

use super::bucket::BucketConfig;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::provider_config::ProviderConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Builder, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    SharedCredentialsProvider, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use kvd_proto::Error;
use std::time::Duration;

/// What a certificate file has in it, once for each.
const PEM_BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const PEM_END: &str = "-----END CERTIFICATE-----";

/// A client; it connects when it is used. Public for those who measure the SDK alone beside a `Bucket`.
pub async fn client(config: &BucketConfig) -> Result<Client, Error> {
    let http = http_client(config)?;
    let region = Region::new(config.region.clone());
    let mut builder = Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .credentials_provider(credentials(config, &http, &region).await)
        .http_client(http)
        .region(region)
        .force_path_style(config.path_style)
        .retry_config(RetryConfig::disabled())
        .timeout_config(
            TimeoutConfig::builder().connect_timeout(Duration::from_millis(config.timeout_ms)).build(),
        )
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if !config.endpoint.is_empty() {
        builder = builder.endpoint_url(&config.endpoint);
    }
    Ok(Client::from_conf(builder.build()))
}

async fn credentials(
    config: &BucketConfig,
    http: &SharedHttpClient,
    region: &Region,
) -> SharedCredentialsProvider {
    if let Some((key, secret)) = &config.keys {
        return SharedCredentialsProvider::new(Credentials::new(key, secret, None, None, "kvd.toml"));
    }
    let provider =
        ProviderConfig::without_region().with_region(Some(region.clone())).with_http_client(http.clone());
    SharedCredentialsProvider::new(DefaultCredentialsChain::builder().configure(provider).build().await)
}

fn http_client(config: &BucketConfig) -> Result<SharedHttpClient, Error> {
    let builder = aws_smithy_http_client::Builder::new().pool_max_idle_per_host(config.requests_max);
    if config.endpoint.starts_with("http://") {
        return Ok(builder.build_http());
    }
    let mut trust = TrustStore::default();
    if let Some(pem) = &config.ca_pem {
        check_pem(pem)?;
        trust = TrustStore::empty().with_pem_certificate(pem.clone());
    }
    let context = TlsContext::builder().with_trust_store(trust).build();
    let context = context.map_err(|error| not_certificates(error.to_string()))?;
    Ok(builder.tls_provider(Provider::Rustls(CryptoMode::Ring)).tls_context(context).build_https())
}

/// The TLS library takes what is no certificate for a broken promise and panics, so it is looked at first.
fn check_pem(pem: &[u8]) -> Result<(), Error> {
    let text = std::str::from_utf8(pem).map_err(|_| not_certificates("it is no text"))?;
    let mut blocks = text.split(PEM_BEGIN).skip(1).peekable();
    if blocks.peek().is_none() {
        return Err(not_certificates("it has none"));
    }
    for block in blocks {
        let (body, _) = block.split_once(PEM_END).ok_or_else(|| not_certificates("one has no end"))?;
        let digits: String = body.split_whitespace().collect();
        let der =
            aws_smithy_types::base64::decode(digits).map_err(|_| not_certificates("one is no base64"))?;
        if !is_sequence(&der) {
            return Err(not_certificates("one is no DER"));
        }
    }
    Ok(())
}

/// Whether it is one DER sequence and nothing after it, which is as far as a certificate's frame goes.
fn is_sequence(der: &[u8]) -> bool {
    match der {
        [0x30, 0x82, high, low, rest @ ..] => usize::from(*high) << 8 | usize::from(*low) == rest.len(),
        [0x30, 0x81, length, rest @ ..] => usize::from(*length) == rest.len(),
        [0x30, length @ 0..=0x7F, rest @ ..] => usize::from(*length) == rest.len(),
        _ => false,
    }
}

fn not_certificates(why: impl Into<String>) -> Error {
    Error::invalid(
        "s3.ca_file",
        format!("not certificates: {}", why.into()),
        "give a file of PEM certificates",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_certificate_is_said_to_be_none() {
        let block = |body: &str| format!("{PEM_BEGIN}\n{body}\n{PEM_END}\n");
        for bad in ["", "hello", PEM_BEGIN, &block("!!!"), &block("AAAA"), &block("MAQB")] {
            let error = check_pem(bad.as_bytes()).unwrap_err();
            assert!(error.to_string().contains("not certificates"), "{bad}: {error}");
        }
        assert!(check_pem(&[0xFF]).is_err());
        assert_eq!(check_pem(block("MAMB\nAgM=").as_bytes()), Ok(()));
    }
}
