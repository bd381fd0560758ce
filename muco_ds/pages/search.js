// Pictures that are dropped or pasted anywhere on the page go to the page's upload.
function acceptPictures(upload) {
  const add = (files) => {
    if (files.length) getElement(upload).$refs.qRef.addFiles([...files].slice(0, 1));
  };
  const mark = (on) => document.body.classList.toggle("dropping", on);
  document.addEventListener("dragover", (event) => { event.preventDefault(); mark(true); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(false); });
  document.addEventListener("drop", (event) => { event.preventDefault(); mark(false); add(event.dataTransfer.files); });
  document.addEventListener("paste", (event) => add(event.clipboardData.files));
}
