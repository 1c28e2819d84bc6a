// The search runs in a worker, which browsers refuse to pages opened from a disk: there a frame runs its script.
if (location.protocol === "file:") {
  const prepare = () => {
    window.postMessage = (data) => parent.postMessage(data, "*");
    window.importScripts = async (...urls) => {
      for (const url of urls)
        await new Promise((done) => document.body.append(Object.assign(document.createElement("script"), { src: url, onload: done })));
    };
  };
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.loaded = new Promise((done) => (this.frame.onload = done));
      this.frame.srcdoc = `<body><script>(${prepare})()</script><script src="${new URL(url, document.baseURI)}"></script>`;
      addEventListener("message", (event) => {
        if (event.source === this.frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
      });
      document.body.append(this.frame);
    }
    async postMessage(data) {
      await this.loaded;
      this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
